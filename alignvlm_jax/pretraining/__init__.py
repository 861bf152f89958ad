"""How the shipped nano backbones were made: an encoder and a decoder, trained from nothing."""
