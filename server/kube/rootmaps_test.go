package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/workqueue"
)

func namespaceNamed(name string, phase corev1.NamespacePhase) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NamespaceStatus{Phase: phase}}
}

func rootMapIn(namespace, roots, label string) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: rootMapName, Labels: map[string]string{rootMapLabel: label}},
		Data:       map[string]string{rootMapKey: roots},
	}
}

// newTestRootMaps has a queue and watches nothing.
func newTestRootMaps(t *testing.T) *rootMaps {
	m := newRootMaps("prod", nil)
	m.queue = workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[string]())
	t.Cleanup(m.queue.ShutDown)
	m.open = [2]int{1, 1}
	return m
}

func TestWhatARootMapNeeds(t *testing.T) {
	m := newTestRootMaps(t)
	m.publish("one")
	m.setNamespace(namespaceNamed("a", corev1.NamespaceActive))
	if got := m.need("a"); got != upToDate {
		t.Errorf("before anything was listed: %v", got)
	}
	m.replaceNamespaces([]*corev1.Namespace{
		namespaceNamed("a", corev1.NamespaceActive), namespaceNamed("going", corev1.NamespaceTerminating), namespaceNamed("kube-system", corev1.NamespaceActive),
		namespaceNamed("good", ""), namespaceNamed("old", ""), namespaceNamed("edited", ""), namespaceNamed("unlabeled", ""),
	})
	if got := m.need("a"); got != upToDate {
		t.Errorf("before the ConfigMaps were listed: %v", got)
	}
	m.replaceMaps([]*corev1.ConfigMap{
		rootMapIn("good", "one", "true"), rootMapIn("old", "zero", "true"), rootMapIn("edited", "one\nmore", "true"),
		rootMapIn("unlabeled", "one", ""), rootMapIn("gone", "zero", "true"),
	})
	want := map[string]need{
		"a": create, "kube-system": create, "good": upToDate, "old": amend, "edited": amend, "unlabeled": amend,
		"going": upToDate, "gone": upToDate,
	}
	for namespace, want := range want {
		if got := m.need(namespace); got != want {
			t.Errorf("%s: %d, want %d", namespace, got, want)
		}
	}
	if current, behind := m.count(); current != 1 || behind != 5 {
		t.Errorf("%d current, %d behind", current, behind)
	}
	m.setMap(rootMapIn("old", "one", "true"))
	m.dropMap(rootMapIn("good", "one", "true"))
	m.dropNamespace(namespaceNamed("edited", ""))
	m.setNamespace(namespaceNamed("unlabeled", corev1.NamespaceTerminating))
	for namespace, want := range map[string]need{"old": upToDate, "good": create, "edited": upToDate, "unlabeled": upToDate} {
		if got := m.need(namespace); got != want {
			t.Errorf("%s: %d, want %d", namespace, got, want)
		}
	}
	m.publish("two")
	if current, behind := m.count(); current != 0 || behind != 4 || m.need("old") != amend {
		t.Errorf("after other roots: %d current, %d behind", current, behind)
	}
	m.setOpen(watchRootMaps, false)
	for namespace := range maps.Clone(m.namespaces) {
		m.dropNamespace(namespaceNamed(namespace, ""))
	}
	if current, behind := m.count(); current != 0 || behind != 1 {
		t.Errorf("while nothing is known: %d current, %d behind", current, behind)
	}
}

// Other roots reach 5 000 namespaces by and by, and one that is new meanwhile
// needs not wait for them.
func TestOtherRootsAreSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newTestRootMaps(t)
		var all []*corev1.Namespace
		var held []*corev1.ConfigMap
		for i := range 5000 {
			name := fmt.Sprintf("n%d", i)
			all, held = append(all, namespaceNamed(name, "")), append(held, rootMapIn(name, "one", "true"))
		}
		m.publish("one")
		m.replaceNamespaces(all)
		m.replaceMaps(held)
		synctest.Wait()
		if n := m.queue.Len(); n != 0 {
			t.Fatalf("%d are queued and nothing is to be done", n)
		}
		m.publish("two")
		synctest.Wait()
		if n := m.queue.Len(); n > 1+rootMapSpread/10 {
			t.Errorf("%d are queued at once", n)
		}
		m.setNamespace(namespaceNamed("new", ""))
		synctest.Wait()
		if n := m.queue.Len(); n > 1+rootMapSpread/10 {
			t.Errorf("a new one comes after %d", n)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := m.queue.Len(); n < 9*rootMapSpread || n > 11*rootMapSpread {
			t.Errorf("after ten seconds there were %d", n)
		}
		time.Sleep(95 * time.Second)
		synctest.Wait()
		if n := m.queue.Len(); n != 5001 {
			t.Errorf("after all that time there were %d", n)
		}
	})
}

func TestAnotherWriterIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newTestRootMaps(t)
		var log bytes.Buffer
		logger := slog.New(slog.NewTextHandler(&log, nil))
		m.publish("one")
		m.replaceNamespaces([]*corev1.Namespace{namespaceNamed("a", "")})
		m.replaceMaps(nil)
		undo := func() {
			m.mu.Lock()
			last := m.wrote["a"]
			last.at, last.sum = time.Now(), m.sum
			m.wrote["a"] = last
			m.mu.Unlock()
			m.setMap(rootMapIn("a", "one", "true"))
			m.setMap(rootMapIn("a", "istiod's", "true"))
			m.report(t.Context(), logger)
		}
		undo()
		time.Sleep(time.Minute)
		m.setMap(rootMapIn("a", "by hand", "true")) // long after
		undo()
		undo()
		if log.Len() != 0 {
			t.Errorf("told too early: %s", log.String())
		}
		undo()
		undo()
		if n := strings.Count(log.String(), "ENABLE_CA_SERVER=false"); n != 1 {
			t.Errorf("told %d times: %s", n, log.String())
		}
		m.setMap(rootMapIn("a", "one", "true"))
		m.report(t.Context(), logger)
		m.report(t.Context(), logger)
		if n := strings.Count(log.String(), "all namespaces have the roots"); n != 1 {
			t.Errorf("told %d times: %s", n, log.String())
		}
	})
}

// So is who takes the label away, or deletes it again and again; a namespace that is
// going takes it along, and what happens once is no fight.
func TestWhoTakesTheRootsAwayIsNoticed(t *testing.T) {
	for name, c := range map[string]struct {
		undo  func(*rootMaps)
		fight bool
	}{
		"pruned":  {func(m *rootMaps) { m.setMap(rootMapIn("a", "one", "")) }, true},
		"deleted": {func(m *rootMaps) { m.dropMap(rootMapIn("a", "one", "true")) }, true},
		"deleted with its namespace": {func(m *rootMaps) {
			m.setNamespace(namespaceNamed("a", corev1.NamespaceTerminating))
			m.dropMap(rootMapIn("a", "one", "true"))
		}, false},
		"now and then": {func(m *rootMaps) {
			time.Sleep(undoneWithin + time.Second)
			m.dropMap(rootMapIn("a", "one", "true"))
		}, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			m := newTestRootMaps(t)
			var log bytes.Buffer
			m.publish("one")
			m.replaceNamespaces([]*corev1.Namespace{namespaceNamed("a", "")})
			m.replaceMaps(nil)
			for range 2 * undoneTimes {
				m.mu.Lock()
				m.wrote["a"] = lastWrite{at: time.Now(), sum: m.sum, undone: m.wrote["a"].undone}
				m.mu.Unlock()
				m.setMap(rootMapIn("a", "one", "true"))
				c.undo(m)
				m.report(t.Context(), slog.New(slog.NewTextHandler(&log, nil)))
			}
			if n := strings.Count(log.String(), "somebody else"); n != 0 != c.fight || n > 1 {
				t.Errorf("%s: told %d times: %s", name, n, log.String())
			}
		})
	}
}

// rootMapAPI notes what is written, and refuses it if it has a status to.
type rootMapAPI struct {
	t      *testing.T
	status *metav1.Status
	asked  []string
	bodies [][]byte
}

func (a *rootMapAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		a.t.Error(err)
	}
	a.asked, a.bodies = append(a.asked, r.Method+" "+r.URL.Path), append(a.bodies, body)
	w.Header().Set("Content-Type", "application/json")
	if a.status != nil {
		w.WriteHeader(int(a.status.Code))
		_ = json.NewEncoder(w).Encode(a.status)
		return
	}
	_ = json.NewEncoder(w).Encode(corev1.ConfigMap{TypeMeta: metav1.TypeMeta{Kind: "ConfigMap", APIVersion: "v1"}})
}

func TestRootMapsAreWritten(t *testing.T) {
	a := &rootMapAPI{t: t}
	server := httptest.NewServer(a)
	t.Cleanup(server.Close)
	m := newTestRootMaps(t)
	var err error
	if m.api, err = newAPI("prod", &rest.Config{Host: server.URL}, "test"); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	m.publish("one")
	m.replaceNamespaces([]*corev1.Namespace{namespaceNamed("a", ""), namespaceNamed("b", "")})
	m.replaceMaps([]*corev1.ConfigMap{rootMapIn("b", "zero", "")})
	keep := func(namespace string) {
		t.Helper()
		m.keep(t.Context(), namespace, logger)
	}
	keep("a")
	keep("b")
	keep("b") // too soon
	if n := m.written(); n != 2 {
		t.Errorf("%d writes are counted", n)
	}
	if want := "[POST /api/v1/namespaces/a/configmaps PATCH /api/v1/namespaces/b/configmaps/istio-ca-root-cert]"; fmt.Sprint(a.asked) != want {
		t.Fatalf("asked %v, want %s", a.asked, want)
	}
	var made corev1.ConfigMap
	if _, _, err := scheme.Codecs.UniversalDeserializer().Decode(a.bodies[0], nil, &made); err != nil {
		t.Fatal(err)
	}
	if made.Name != "istio-ca-root-cert" || made.Data["root-cert.pem"] != "one" || made.Labels["istio.io/config"] != "true" {
		t.Errorf("made %+v", made)
	}
	if want := `{"data":{"root-cert.pem":"one"},"metadata":{"labels":{"istio.io/config":"true"}}}`; string(a.bodies[1]) != want {
		t.Errorf("changed by %s, want %s", a.bodies[1], want)
	}

	refuse := func(status metav1.Status, want string) {
		t.Helper()
		status.TypeMeta, status.Status = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, "Failure"
		a.status, m.wrote, m.told = &status, map[string]lastWrite{}, map[string]time.Time{}
		log.Reset()
		keep("a")
		keep("b")
		lines := strings.Count(log.String(), "\n")
		if want == "" && lines > 0 || want != "" && (lines != 1 || !strings.Contains(log.String(), want)) {
			t.Errorf("%s: the log has %q", status.Reason, log.String())
		}
	}
	refuse(metav1.Status{Code: 403, Reason: metav1.StatusReasonForbidden}, "does not let the server create configmaps")
	refuse(metav1.Status{Code: 500, Reason: metav1.StatusReasonInternalError}, "gives no answer")
	refuse(metav1.Status{Code: 422, Reason: metav1.StatusReasonInvalid}, "if the ConfigMap is immutable, delete it")
	refuse(metav1.Status{Code: 409, Reason: metav1.StatusReasonAlreadyExists}, "")
	refuse(metav1.Status{Code: 404, Reason: metav1.StatusReasonNotFound}, "")
	refuse(metav1.Status{
		Code: 403, Reason: metav1.StatusReasonForbidden,
		Details: &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: corev1.NamespaceTerminatingCause}}},
	}, "")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	log.Reset()
	m.keep(ctx, "a", logger)
	if log.Len() > 0 {
		t.Errorf("after its end: %s", log.String())
	}
}
