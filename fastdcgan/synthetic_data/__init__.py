"""More training images for a classifier, drawn from generators that are trained on its own: as many
of each class, no copies of the real ones. Not here: the random changes that a GAN's discriminator
sees in training, which are DiffAugment (training/augmentation.py).
"""
