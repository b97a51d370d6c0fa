"""Measuring what an adapter has learned: detectors, prompt fidelity, denoising losses and the figures made of them."""
