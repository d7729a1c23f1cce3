"""The look of one image on another (Gatys et al. 2016), by the features of the project's own
networks."""
