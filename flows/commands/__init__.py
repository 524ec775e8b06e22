"""The commands of `logitmill`: a file each, and what they share. They import nothing heavy."""
