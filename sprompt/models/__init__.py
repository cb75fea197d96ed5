"""Networks, each in a folder of its own. `protocol` is the interface that methods use."""
