"""Independent PyTorch reference of ViT, MAE and TinyMIM, for parity tests and benchmarks only."""
