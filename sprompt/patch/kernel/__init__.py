"""The folder that transformers' kernel interface loads as a local kernel: metadata.json, and `layers` with the layers."""

from sprompt.patch.kernel import layers

__all__ = ["layers"]
