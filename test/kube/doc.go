// Package kube runs a real Kubernetes API: kube-apiserver and etcd, built by
// tools.sh, in a directory of their own on the loopback. There is no kubelet, no
// controller and no scheduler; a test plays their part where it needs them:
// it binds pods to nodes and says that they run.
package kube
