// Command program stands for the real ones.
package main

func main() { println("here") }
