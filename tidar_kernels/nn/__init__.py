"""What people build models from: the attention layer, rotary positions, gated adapters, the training objective."""
