"""Empty: a package of this name that another project installs would else be found first."""
