"""Ways to compare predictions with labels, chosen by name: `--evaluator coco`."""
