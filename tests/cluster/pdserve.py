"""The command line as a module, to run it from the tree: python -m tests.cluster.pdserve."""

from cluster.cli import main

if __name__ == "__main__":
    main()
