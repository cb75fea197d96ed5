"""The colours of the pictures that networks get: each channel of 0 to 255, less its mean, divided by its standard deviation over ImageNet.

Batches of pictures and views are made with these values. A network of other values converts its input, see `EfficientNet`.
"""

MEAN = (123.675, 116.28, 103.53)  # of R, G and B
STD = (58.395, 57.12, 57.375)
