"""Mixed-bit fused MoE over one arena per layer and one descriptor table."""
