"""`python -m workflow_scripts.export`."""

from .step import main

if __name__ == "__main__":
    main()
