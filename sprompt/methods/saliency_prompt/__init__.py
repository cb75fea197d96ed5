"""Saliency Prompt: a frozen backbone finds masks in pictures. They are the labels and the prompts of a model's queries."""

from sprompt.methods.saliency_prompt.config import ProposalConfig, SaliencyPromptConfig
from sprompt.methods.saliency_prompt.generate import Generated, fingerprint, generate
from sprompt.methods.saliency_prompt.injection import Injection
from sprompt.methods.saliency_prompt.pretrain import Pretraining
from sprompt.methods.saliency_prompt.prompts import Prompts, prompts_of, read_prompts
from sprompt.methods.saliency_prompt.proposals import Proposals, propose, view

__all__ = [
    "Generated",
    "Injection",
    "Pretraining",
    "Prompts",
    "ProposalConfig",
    "Proposals",
    "SaliencyPromptConfig",
    "fingerprint",
    "generate",
    "prompts_of",
    "propose",
    "read_prompts",
    "view",
]
