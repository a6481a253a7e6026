"""`python -m pi05_ros VERB` is `pi05 VERB`."""

import sys

from pi05_ros.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
