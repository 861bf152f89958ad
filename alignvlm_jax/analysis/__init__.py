"""What a trained model does, and why: robustness, vocabulary, geometry, rare names."""
