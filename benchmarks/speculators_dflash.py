"""DFlash of `speculators` 0.9 on the trajectories and features of ours, for a comparison on one GPU.

Its network, attention mask, anchors and loss are imported and run as they are; the data loader and the trainer around
them are replaced, because theirs read features from files. The training recipe is its default for DFlash: Muon for
matrices and AdamW for the rest, linear decay, D-PACE weights, cross-entropy with the target's argmax, fused kernels,
random initialisation.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config

from unmask.models.dflash import DFlashConfig, DFlashDraft
from unmask.training.feature_cache import FeatureCache
from unmask.training.rates import rate_share


class SpeculatorsTrainer:
    """Takes the steps that `DraftTrainer` takes, with their network.

    Args:
        features: with `final`, on packed sequences.
        config: the training section whose budget, rates and anchors are used.
    """

    def __init__(self, sizes: DFlashConfig, features: FeatureCache, config: Any) -> None:
        from speculators.config import SpeculatorsConfig, VerifierConfig
        from speculators.losses import resolve_loss_config
        from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
        from speculators.proposals.greedy import GreedyTokenProposalConfig
        from speculators.train.optimizers import build_optimizers

        self.features, self.config, self.sizes = features, config, sizes
        self.sequences, self.target = features.sequences, features.target
        torch.manual_seed(config.seed)
        layers = Qwen3Config(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_key_value_heads,
            head_dim=sizes.head_dim,
            max_position_embeddings=sizes.max_position_embeddings,
            rms_norm_eps=sizes.rms_norm_eps,
            rope_parameters=dict(sizes.rope_parameters),
        )
        cuda = self.target.device.type == "cuda"
        layers._attn_implementation = "simple_flex_attention" if cuda else "eager"
        proposal = GreedyTokenProposalConfig(speculative_tokens=sizes.block_size - 1)
        self.model: Any = DFlashDraftModel(
            DFlashSpeculatorConfig(
                transformer_layer_config=layers,
                draft_vocab_size=sizes.vocab_size,
                block_size=sizes.block_size,
                aux_hidden_state_layer_ids=[i + 1 for i in sizes.target_layer_ids],
                mask_token_id=sizes.mask_token_id,
                speculators_config=SpeculatorsConfig(
                    algorithm="dflash",
                    proposal_methods=[proposal],
                    default_proposal_method="greedy",
                    verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
                ),
            )
        )
        for table in (self.model.embed_tokens, self.model.lm_head, self.model.verifier_lm_head):
            table.weight.data.copy_(self.target.lm_head)
        # Our features carry the target's final states after its norm.
        self.model.verifier_norm = nn.Identity()
        self.model.to(self.target.device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = build_optimizers(self.model, _muon(config.highest_rate))
        self.loss = resolve_loss_config("ce", "fused" if cuda else "eager")
        # Inside of a graph torch 2.11's compiler fails on the kernel's list of configurations ("already tracked for
        # mutation"); between two graphs it runs as it is.
        self.loss = {name: (torch.compiler.disable(loss), weight) for name, (loss, weight) in self.loss.items()}
        self.steps_done = 0

    def step(self, progress: float) -> dict[str, Tensor]:
        """One optimiser step; `loss` stays on the device."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.highest_rate * rate_share(self.config, progress)
        batch = self.sequences.batch(self.sequences.rows(self.steps_done))
        documents = torch.full_like(batch.ids_BT, -1)
        start = 0
        for number, length in enumerate(batch.lengths):
            documents[0, start : start + length] = number
            start += length
        columns = torch.arange(batch.ids_BT.shape[1])[None]
        device = self.target.device
        features = self.features.get(batch)
        split = len(self.sizes.target_layer_ids) * self.sizes.hidden_size
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            _, loss, _ = self.model(
                hidden_states=features[..., :split],
                input_ids=batch.ids_BT.to(device),
                loss_mask=batch.response_BT.long().to(device),
                verifier_last_hidden_states=features[..., split:],
                document_ids=documents.to(device),
                position_ids=(columns - batch.starts_BT).to(device),
                loss_config=self.loss,
                max_anchors=self.config.anchors_per_step,
                per_position_loss_weight="dpace",
            )
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, self.config.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps_done += 1
        return {"loss": loss.detach()}

    def draft(self) -> DFlashDraft:
        """The trained weights in our network: tensor names are the same."""
        draft = DFlashDraft(self.sizes).to(self.target.device)
        names = draft.state_dict()
        draft.load_state_dict({n: t for n, t in self.model.state_dict().items() if n in names})
        return draft.eval().requires_grad_(False)


def _muon(rate: float) -> SimpleNamespace:
    """Their optimiser's defaults."""
    return SimpleNamespace(
        optimizer="muon", lr=rate, weight_decay=0.01, muon_lr=rate, muon_momentum=0.95, muon_weight_decay=0.1,
        muon_ns_steps=5, muon_adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip


def unavailable() -> str | None:
    """Why speculators cannot run here; None if it can."""
    try:
        import speculators.models.dflash  # noqa: F401
    except ImportError as error:
        return str(error)
    return None
