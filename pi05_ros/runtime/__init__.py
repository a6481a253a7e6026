"""The real-time loop without ROS: policy, mailbox, worker, chunking."""
