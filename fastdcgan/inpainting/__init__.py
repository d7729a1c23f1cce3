"""Semantic inpainting with a trained DCGAN (Yeh et al. 2017): what is hidden of an image is made up
by the generator, from what is seen of it."""
