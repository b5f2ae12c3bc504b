"""GPT-2 whose layers also use keys or values of layers below, for Transformers. gpt2x3's convert.py puts this file
beside the weights, so that this loads them:

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

All but the attention is Transformers' own GPT-2: training, generation, the cache. config.json names the attention:

    skip    in layers l >= skip_distance, the first skip_heads heads attend to the keys and values of the layer
            skip_distance below, and the other heads to their own layer's
    depth   each layer's values are first mixed with those of its sources, S = {j < l: depth_stride divides j, or
            j >= l - depth_window}, at each token separately: a = softmax over S and l itself of q_l·k_j/√head_dim;
            ṽ_l = a_l v_l + Σ_{j in S} a_j ṽ_j replaces v_l

Shapes: B batch, T new tokens, U tokens with those in the cache.
"""

import math

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, eager_attention_forward


class GPT2X3Config(GPT2Config):
    model_type = "gpt2x3"


class GPT2X3Attention(GPT2Attention):
    """`layers` holds, for each layer below, what layers above may use of it in this forward pass: a pair (k, v)."""

    def forward(self, hidden_states, cache=None, attention_mask=None, layers=None, past_key_values=None, **kwargs):
        c, l = self.config, self.layer_idx
        B, T, _ = hidden_states.shape
        cache = past_key_values if cache is None else cache  # older name
        q, k, v = (y.view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
                   for y in self.c_attn(hidden_states).split(self.split_size, dim=2))

        if c.attention == "depth":
            v = self.mix(q, k, v, layers)
            layers[l] = k, v
            if cache is not None:
                k, v = cache.update(k, v, l, kwargs)  # (B, heads, U, head_dim)
        elif c.attention == "skip":
            skips = l >= c.skip_distance
            if skips and l + c.skip_distance >= c.num_hidden_layers:  # no layer reads the first heads
                k, v = k[:, c.skip_heads:], v[:, c.skip_heads:]
            if cache is not None:
                k, v = cache.update(k, v, l, kwargs)
            layers[l] = k, v
            if skips:
                own = self.num_heads - c.skip_heads
                k, v = (torch.cat([below[:, :c.skip_heads], y[:, y.shape[1] - own:]], dim=1)
                        for below, y in zip(layers[l - c.skip_distance], (k, v)))

        attend = ALL_ATTENTION_FUNCTIONS.get(c._attn_implementation, eager_attention_forward)
        output, weights = attend(self, q, k, v, attention_mask, scaling=self.head_dim**-0.5,
                                 dropout=self.attn_dropout.p if self.training else 0.0, **kwargs)
        return self.resid_dropout(self.c_proj(output.reshape(B, T, -1))), weights

    def mix(self, q, k, v, layers):
        l, stride, window = self.layer_idx, self.config.depth_stride, self.config.depth_window
        mixed = [layers[j] for j in range(l) if j % stride == 0 or j >= l - window] + [(k, v)]
        scores = torch.stack([(q * k_j).sum(-1) for k_j, _ in mixed]) / math.sqrt(self.head_dim)
        a = scores.softmax(dim=0)  # (sources, B, heads, T)
        return sum(a_j.unsqueeze(-1) * v_j for a_j, (_, v_j) in zip(a, mixed))


class GPT2X3Model(GPT2Model):
    config_class = GPT2X3Config

    def __init__(self, config):
        super().__init__(config)
        for l, block in enumerate(self.h):
            block.attn = GPT2X3Attention(config, layer_idx=l)
        self.post_init()

    def forward(self, *args, **kwargs):
        return super().forward(*args, layers={}, **kwargs)


class GPT2X3LMHeadModel(GPT2LMHeadModel):
    config_class = GPT2X3Config
    supports_gradient_checkpointing = False  # a layer would be computed again without those below it

    def __init__(self, config):
        super().__init__(config)
        self.transformer = GPT2X3Model(config)
        self.post_init()
