"""Networks. Each lives in a room of its own; `protocol` is what methods ask of them."""
