"""``python -m nanolib`` and the ``nanolib`` command."""

import sys


def main() -> int:
    from nanolib.ui import cli

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
