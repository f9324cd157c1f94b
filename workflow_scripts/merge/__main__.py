"""`python -m workflow_scripts.merge`."""

from .step import main

if __name__ == "__main__":
    main()
