"""Base model and LoRA as two streams of hidden states over one shared trunk.

`streams` the nouns; `adapter` what LoRA is put where; `branches` tokens → hidden states, `stacked`
all branches in one pass; `heads` hidden states → logits, KL, Q̂ and V̂; `composed` more adapters
beside the first; `qadapter` the model with its files.
"""

from qadapter.model.adapter import lora_config
from qadapter.model.qadapter import QAdapterModel
from qadapter.model.streams import Adapter, BaseScalars, QAndV, Streams

__all__ = ["Adapter", "BaseScalars", "QAdapterModel", "QAndV", "Streams", "lora_config"]
