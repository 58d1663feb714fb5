"""Full-catalogue ranking inside the target's domain, and the metrics made of the ranks."""
