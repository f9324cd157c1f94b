"""`python -m workflow_scripts.prepare_model`."""

from .step import main

if __name__ == "__main__":
    main()
