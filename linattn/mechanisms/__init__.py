"""What the papers name: one file a mechanism. None imports another; what they share is in attention.py."""
