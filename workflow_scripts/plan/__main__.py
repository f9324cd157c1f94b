"""`python -m workflow_scripts.plan`."""

from .describe import main

if __name__ == "__main__":
    main()
