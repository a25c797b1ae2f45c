package kube

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// caKey is the key of the authorities in a Secret of type kubernetes.io/tls.
const caKey = "ca.crt"

// TLSSecret is what a Secret of type kubernetes.io/tls has, in PEM. It is never
// logged.
type TLSSecret struct {
	Chain, Key, Roots []byte

	held *corev1.Secret // as it was read; nil: it is not there
}

// TLSSecret reads a Secret. One that is not there is empty.
func (c *Clusters) TLSSecret(ctx context.Context, cluster, namespace, name string) (TLSSecret, error) {
	cl := c.byName[cluster]
	if cl == nil {
		return TLSSecret{}, errNoCluster
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	held := &corev1.Secret{}
	err := cl.api.core.Get().Namespace(namespace).Resource("secrets").Name(name).Do(ctx).Into(held)
	switch {
	case apierrors.IsNotFound(err):
		return TLSSecret{}, nil
	case err != nil:
		return TLSSecret{}, cl.api.unavailable(err, "get secrets "+name)
	}
	return TLSSecret{Chain: held.Data[corev1.TLSCertKey], Key: held.Data[corev1.TLSPrivateKeyKey], Roots: held.Data[caKey], held: held}, nil
}

// PutTLSSecret makes a Secret hold what is given, where it was read as was.
// Whatever else it holds stays.
func (c *Clusters) PutTLSSecret(ctx context.Context, cluster, namespace, name string, was, will TLSSecret) error {
	cl := c.byName[cluster]
	if cl == nil {
		return errNoCluster
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	made := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Type: corev1.SecretTypeTLS}
	if was.held != nil {
		made = was.held.DeepCopy()
	}
	if made.Type != corev1.SecretTypeTLS {
		return fault.New(fault.NotReady, "kubernetes_secret_type", "the Secret "+name+" has another type than kubernetes.io/tls, which can't be changed: delete it")
	}
	if made.Data == nil {
		made.Data = map[string][]byte{}
	}
	made.Data[corev1.TLSCertKey], made.Data[corev1.TLSPrivateKeyKey], made.Data[caKey] = will.Chain, will.Key, will.Roots
	right, err := "update secrets "+name, error(nil)
	if was.held == nil {
		right = "create secrets"
		err = cl.api.core.Post().Namespace(namespace).Resource("secrets").Body(made).Do(ctx).Error()
	} else {
		err = cl.api.core.Put().Namespace(namespace).Resource("secrets").Name(name).Body(made).Do(ctx).Error()
	}
	switch {
	case apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err):
		return fault.Wrap(fault.Conflict, err, "kubernetes_conflict", "somebody else changed the Secret "+name+" at the same time: it is tried again")
	case apierrors.IsInvalid(err):
		// Not with its cause, which may quote what was sent.
		return fault.New(fault.NotReady, "kubernetes_secret_refused", "the API server does not take the Secret "+name+": if it is immutable, delete it")
	case err != nil:
		// Likewise: a webhook that denies it may quote it.
		return cl.api.unavailable(&apierrors.StatusError{ErrStatus: metav1.Status{Reason: apierrors.ReasonForError(err), Message: "the API server answers " + string(apierrors.ReasonForError(err))}}, right)
	}
	return nil
}
