"""The lifecycle node: the only code that knows rclpy."""
