"""Networks. Each lives in a folder of its own; `protocol` is what methods ask of them."""
