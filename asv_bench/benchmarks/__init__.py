"""Time, memory and error of every mechanism on one graph; smaller is better throughout."""
