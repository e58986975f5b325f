"""What joins our modifiers to llm-compressor: its data, hooks, schemes and saving, and cures of its defects."""
