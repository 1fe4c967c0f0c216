"""What the tests share: small models and images, running the stages, damage, a web server."""
