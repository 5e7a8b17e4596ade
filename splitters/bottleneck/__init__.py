"""Learned bottlenecks: slimmable encoders, gain tiers, decoder, and how they join a model at its cut."""
