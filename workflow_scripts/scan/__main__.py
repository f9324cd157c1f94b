"""`python -m workflow_scripts.scan`."""

from .step import main

if __name__ == "__main__":
    main()
