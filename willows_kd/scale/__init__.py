"""What a teacher of real size needs: memory, time, restarts and several processes."""
