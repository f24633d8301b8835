"""Unlearn with LoRA adapters: merge the negation of what all of them have learned into their base.

python examples/adapters.py          needs peft and transformers
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import negmerge_fast as nm

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
model = LlamaForCausalLM(config)

# Stand-ins for adapters that were trained on what is to be forgotten. All of them are in one model.
lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
model = get_peft_model(model, lora, adapter_name="seed-0")
for seed in (1, 2, 3):
    model.add_adapter(f"seed-{seed}", lora)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter += 0.02 + 0.01 * torch.randn_like(parameter)

# A new state dict under the names of the model without adapters. Directories that PEFT has written may stand in the list, too:
# nm.merge(model, ["adapter-0", "adapter-1"], scale=0.9)
merged = nm.merge(model, [model], scale=0.9)
plain = LlamaForCausalLM(config)
plain.load_state_dict(merged)

# Or in place: the base's weights are written. The adapters stay as they are, and are unloaded.
stats = nm.merge_(model, [model], scale=0.9)
unlearned = model.unload()
print(f"{stats.agreed:,} of {stats.elements:,} elements agree in {len(stats.tensors)} tensors")

tokens = torch.tensor([[1, 2, 3]])
with torch.no_grad():
    assert torch.equal(plain(tokens).logits, unlearned(tokens).logits)
