"""Training steps of a toy query head: prompt the queries, predict masks, match them with targets, compute the losses."""

import torch

from sprompt import BitMasks
from sprompt.ops import linear_assignment, mask_conv, mask_loss, mask_mean, match_cost, prompt_match

torch.manual_seed(0)
images, kernels, channels, height, width = 2, 10, 16, 32, 48
labels = torch.zeros(images, 3, height, width, dtype=torch.bool)
for image, (rows, columns) in enumerate([((2, 12, 20), (4, 18, 30)), ((5, 18, 0), (10, 28, 0))]):
    for target, (y, x) in enumerate(zip(rows, columns, strict=True)):
        labels[image, target, y : y + 9, x : x + 13] = True
counts = torch.tensor([3, 2])  # the second image has two targets; the third is padding
labels[1, 2] = False
targets = BitMasks.from_dense(labels)  # (2, 3)

# A feature map in which every object has its own direction, like the features of a backbone.
directions = torch.nn.functional.normalize(torch.randn(images, 3, channels), dim=-1)
features = torch.einsum("bghw,bgc->bchw", labels.float(), directions) + 0.2 * torch.randn(
    images, channels, height, width
)
prompts = mask_mean(features, targets)  # (2, 3, 16)
queries = torch.nn.Parameter(torch.randn(kernels, channels))
bias = torch.nn.Parameter(torch.zeros(()))

optimizer = torch.optim.AdamW([queries, bias], lr=0.1)
for step in range(30):
    prompted = prompt_match(queries, prompts, counts)  # every query takes the most similar prompt
    logits = mask_conv(features, prompted.kernels) + bias  # (2, 10, 32, 48)
    with torch.no_grad():
        cost = match_cost(logits, targets, counts=counts, weights=(0.0, 1.0, 4.0))  # (2, 10, 3)
        rows = linear_assignment(cost, counts)  # (2, 3): the query of each target, -1 for none
    image, target = (rows >= 0).nonzero(as_tuple=True)
    bce, dice = mask_loss(logits[image, rows[image, target]], targets[image, target])
    loss = (bce + 4 * dice).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {loss.item():.3f}, queries of the targets {rows.tolist()}")
assert loss.item() < 1.5
