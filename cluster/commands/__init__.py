"""The commands of `pdserve`, one module per family; `cluster.cli` imports each when it is called."""
