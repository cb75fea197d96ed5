"""Pictures and their masks: datasets, splits, transforms, batches."""
