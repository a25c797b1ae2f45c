package kube

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// Run keeps what is known of all clusters current, and what they are told of
// roots, until ctx ends.
func (c *Clusters) Run(ctx context.Context, roots Roots, log *slog.Logger) error {
	var all sync.WaitGroup
	for _, cl := range c.byName {
		all.Go(func() { cl.run(ctx, log) })
		if cl.publisher != nil {
			all.Go(func() { cl.publisher.run(ctx, roots, log) })
		}
		if cl.rootMaps != nil {
			all.Go(func() { cl.rootMaps.run(ctx, roots, log) })
		}
	}
	all.Wait()
	return nil
}

// Place is where an agent is.
type Place struct {
	Cluster string
	NodeUID string
}

// index of the place's cluster; nil: there is none any more.
func (c *Clusters) index(at Place) *index {
	if cl := c.byName[at.Cluster]; cl != nil {
		return cl.index
	}
	return nil
}

// Follow returns a feed of the pods on a node, nil if its cluster is not
// configured any more. It must be closed.
func (c *Clusters) Follow(at Place) *Feed {
	if x := c.index(at); x != nil {
		return x.follow(at.NodeUID)
	}
	return nil
}

// Replaced says whether the node that had this name was made anew since, which
// makes it another one. False if that can't be told now.
func (c *Clusters) Replaced(at Place, name string) bool {
	x := c.index(at)
	if x == nil {
		return false
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	uid := x.nodes[name]
	return uid != "" && uid != at.NodeUID && x.usable(time.Now()) == nil
}

// PodOn finds the pod with this UID on an agent's node. That none runs there is
// fault.Denied, that it can't be told now fault.NotReady.
func (c *Clusters) PodOn(at Place, podUID string) (*Pod, error) {
	x := c.index(at)
	if x == nil {
		return nil, fault.New(fault.Denied, "no_such_workload_on_node", "this agent's cluster is not one of kubernetes.clusters any more")
	}
	return x.podOn(at.NodeUID, podUID, time.Now())
}

// Runs says whether a pod to which all of these selectors apply runs on the
// node: nil, or why not, as PodOn.
func (c *Clusters) Runs(at Place, wanted selector.Set) error {
	x := c.index(at)
	if x == nil {
		_, err := c.PodOn(at, "")
		return err
	}
	pods, err := x.usablePods(at.NodeUID, time.Now())
	if err != nil {
		return err
	}
	for _, p := range pods {
		if p.runs(at.Cluster, wanted) {
			return nil
		}
	}
	return fault.New(fault.Denied, "no_such_workload_on_node", "no pod to which the entry applies runs on this agent's node, by the cluster's API server")
}

// Template makes the identity of a pod: a path with {namespace},
// {service_account} and {cluster}, each a whole segment.
type Template struct {
	text     string
	td       spiffeid.TrustDomain
	reserved string // path prefix of servers and agents
	parts    []string
}

// Identity is what a pod gets from the template, without an entry, and how long
// its certificates live; zero: as long as others. Rules keep it from pods.
func (c *Clusters) Identity(cluster string, p *Pod) (id spiffeid.ID, ttl time.Duration, ok bool) {
	rule := c.cfg.rule(p)
	if rule.NoIdentity {
		return spiffeid.ID{}, 0, false
	}
	id, err := c.template.id(cluster, p)
	return id, rule.X509SVIDTTL, err == nil
}

// CheckEntry refuses an entry whose ID pods get from the template, unless its
// selectors say the same namespace and ServiceAccount: it would give a pod the
// identity of another.
func (c *Clusters) CheckEntry(id spiffeid.ID, selectors selector.Set) error {
	if c == nil || c.template == nil {
		return nil
	}
	fields, ok := c.template.Fields(id)
	if !ok {
		return nil
	}
	var agreeing []selector.Selector
	var texts []string
	for _, field := range []struct{ name, value string }{{"cluster", fields.Cluster}, {"ns", fields.Namespace}, {"sa", fields.ServiceAccount}} {
		if field.value != "" {
			wanted := fact(field.name, field.value)
			agreeing, texts = append(agreeing, wanted), append(texts, wanted.String())
		}
	}
	if selectors.Contains(selector.NewSet(agreeing...)) {
		return nil
	}
	return fault.Newf(fault.Invalid, "entry_in_template_range",
		"pods get this ID from kubernetes.template: an entry for it needs the selectors %s, or another ID", strings.Join(texts, " "))
}

// The fields of a template.
const (
	fieldNamespace = "{namespace}"
	fieldAccount   = "{service_account}"
	fieldCluster   = "{cluster}"
)

// NewTemplate checks a template. The same path must not come out for two pods
// of different namespace or ServiceAccount, so both have to be in it.
func NewTemplate(td spiffeid.TrustDomain, reserved, text string) (*Template, error) {
	t := &Template{text: text, td: td, reserved: reserved, parts: strings.Split(strings.TrimPrefix(text, "/"), "/")}
	count := map[string]int{}
	for _, part := range t.parts {
		if strings.ContainsAny(part, "{}") && part != fieldNamespace && part != fieldAccount && part != fieldCluster {
			return nil, bad("kubernetes.template has the segment %q: a segment is plain text, {namespace}, {service_account} or {cluster}", part)
		}
		count[part]++
	}
	if !strings.HasPrefix(text, "/") || count[fieldNamespace] != 1 || count[fieldAccount] != 1 || count[fieldCluster] > 1 {
		return nil, bad("kubernetes.template has to begin with a slash and to have {namespace} and {service_account} once, as in /ns/{namespace}/sa/{service_account}")
	}
	if _, err := t.id("a", &Pod{Namespace: "a", ServiceAccount: "a"}); err != nil {
		return nil, bad("kubernetes.template makes no SPIFFE ID: use letters, digits, dot, dash and underscore, as in /ns/{namespace}/sa/{service_account}")
	}
	return t, nil
}

// hasCluster says whether pods of two clusters can't get the same identity.
func (t *Template) hasCluster() bool { return strings.Contains(t.text, fieldCluster) }

func (t *Template) id(cluster string, p *Pod) (spiffeid.ID, error) {
	values := strings.NewReplacer(fieldNamespace, p.Namespace, fieldAccount, p.ServiceAccount, fieldCluster, cluster)
	segments := make([]string, len(t.parts))
	for i, part := range t.parts {
		segments[i] = values.Replace(part)
	}
	id, err := spiffeid.FromSegments(t.td, segments...)
	if err == nil && strings.HasPrefix(id.Path(), t.reserved) {
		err = errReserved
	}
	return id, err
}

// errReserved says that a template made an ID of servers and agents, out of a
// namespace of that name, say. Such a pod gets none.
var errReserved = errors.New("the ID is reserved")

// Fields are what an ID from a template says of its pod.
type Fields struct {
	Cluster                   string // empty: the template does not have it
	Namespace, ServiceAccount string
}

// Fields returns what an ID says, if a pod could get it from the template.
func (t *Template) Fields(id spiffeid.ID) (f Fields, ok bool) {
	segments := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	if id.TrustDomain() != t.td || len(segments) != len(t.parts) {
		return Fields{}, false
	}
	for i, part := range t.parts {
		switch part {
		case fieldNamespace:
			f.Namespace = segments[i]
		case fieldAccount:
			f.ServiceAccount = segments[i]
		case fieldCluster:
			f.Cluster = segments[i]
		default:
			if segments[i] != part {
				return Fields{}, false
			}
		}
	}
	return f, true
}
