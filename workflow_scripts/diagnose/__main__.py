"""`python -m workflow_scripts.diagnose`."""

from .step import main

if __name__ == "__main__":
    main()
