"""`python -m workflow_scripts.report`."""

from .step import main

if __name__ == "__main__":
    main()
