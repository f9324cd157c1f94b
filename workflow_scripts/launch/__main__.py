"""`python -m workflow_scripts.launch`."""

from .step import main

if __name__ == "__main__":
    main()
