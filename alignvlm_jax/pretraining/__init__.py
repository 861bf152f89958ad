"""Trains the shipped nano backbones, an encoder and a decoder, from scratch."""
