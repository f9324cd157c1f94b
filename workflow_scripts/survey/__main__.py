"""`python -m workflow_scripts.survey`."""

from .step import main

if __name__ == "__main__":
    main()
