"""`python -m dist_tl` is `dist-tl`."""

from dist_tl.cli.app import main

if __name__ == "__main__":
    main()
