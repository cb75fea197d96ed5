"""One training step of a toy query head: predict masks, match them with targets, take the losses, follow the gradient."""

import torch

from sprompt import BitMasks
from sprompt.ops import linear_assignment, mask_conv, mask_loss, match_cost, prompt_match

torch.manual_seed(0)
images, kernels, channels, height, width = 2, 10, 16, 32, 48
features = torch.randn(images, channels, height, width)
queries = torch.nn.Parameter(0.1 * torch.randn(kernels, channels))
prompts = torch.randn(images, 3, channels)  # one a proposal
labels = (torch.rand(images, 3, height, width) > 0.7).float()
labels[:, :, 8:20, 10:30] = 1.0
targets = BitMasks.from_dense(labels)  # (2, 3)
counts = torch.tensor([3, 2])  # the second image has two targets; the third entry is padding

optimizer = torch.optim.AdamW([queries], lr=0.02)
for step in range(5):
    matched = prompt_match(queries, prompts, counts)  # every kernel takes up the prompt that is most like it
    logits = mask_conv(features, matched.kernels)  # (2, 10, 32, 48)
    with torch.no_grad():
        cost = match_cost(logits, targets, counts=counts, weights=(0.0, 1.0, 4.0))  # (2, 10, 3)
        rows = linear_assignment(cost, counts)  # (2, 3): the kernel of each target, -1 where there is none
    image, target = (rows >= 0).nonzero(as_tuple=True)
    bce, dice = mask_loss(logits[image, rows[image, target]], targets[image, target])
    loss = (bce + 4 * dice).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}, matched kernels {rows.tolist()}, |gradient| {queries.grad.norm():.4f}")
