"""`python -m workflow_scripts.acquire`."""

import signal

if __name__ == "__main__":
    # Until the step listens itself: nothing is begun that Ctrl-C could leave half done.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .step import main

    main()
