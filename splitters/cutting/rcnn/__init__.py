"""torchvision's R-CNN detectors, cut inside the backbone."""
